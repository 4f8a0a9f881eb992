"""What a run leaves in its folder, and what can end it early."""
