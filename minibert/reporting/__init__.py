"""What a run tells: console, report, model card."""
