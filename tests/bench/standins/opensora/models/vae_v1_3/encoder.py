"""A stand-in, not the official code, where importing this module makes the class known to a registry."""
