"""A run's records as a report that a person reads and a file that a program reads."""
