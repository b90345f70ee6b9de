"""Closed-book questions with exact answers: accuracy, tokens per forward, and how one pays for the other."""
