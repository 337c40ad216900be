"""Text: sample data for the seven domains, and how it is made from packages."""
