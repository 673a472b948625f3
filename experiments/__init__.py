"""Launchers: absl flags in, a frozen configuration out, one function called."""
