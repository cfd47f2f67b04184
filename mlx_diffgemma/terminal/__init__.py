"""What a person sees: drafts painted in place, settled text as plain text."""
