"""Launchers: start the project's commands on a machine or on many."""
