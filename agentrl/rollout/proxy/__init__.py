"""An OpenAI-compatible endpoint that records black-box agents token by token."""
