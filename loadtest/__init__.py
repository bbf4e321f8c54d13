"""Measure any OpenAI endpoint from outside. Imports none of the other packages."""
