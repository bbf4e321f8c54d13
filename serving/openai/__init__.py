"""OpenAI's wire format and our own words, each turned into the other."""
