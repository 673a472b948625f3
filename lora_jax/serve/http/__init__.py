"""A runner behind HTTP, as clients of OpenAI's interface expect it (the extra `serve`)."""
