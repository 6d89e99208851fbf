"""From files and lists to labelled examples."""
