"""The recurrent block of Griffin, whose recurrence is the real-gated linear recurrent unit (RG-LRU)."""
