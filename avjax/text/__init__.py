"""Texts about clips: sentences of action units and prosody, and emotion prompts."""
