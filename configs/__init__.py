"""The configs of the commands, as package data."""
