"""One small adapter a model family: where its routers are, and how they select."""
