"""What is learned: loss, decisions, metrics and calibration of each problem type."""
