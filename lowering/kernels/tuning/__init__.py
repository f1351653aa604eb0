"""Other tile sizes timed, for whoever asks for it."""
