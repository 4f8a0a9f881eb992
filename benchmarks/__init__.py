"""Side-by-side timings: ours and what else a user could pick, alternating in one run. See README.md."""
