"""What a training step consists of on a device."""
