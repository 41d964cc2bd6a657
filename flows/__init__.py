"""What a user launches or schedules, and the command line."""
