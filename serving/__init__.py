"""The HTTP edge and the live router: OpenAI API, one live stream per request, membership."""
