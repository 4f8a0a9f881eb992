"""Side-by-side timings of ours and what else a user could pick, alternating in one run. See README.md."""
