"""Compiled programs of a model for any platform, that run without this library; see `folder.save`."""
