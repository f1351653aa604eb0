"""mhf_compiler: multi-head feed-forward networks, compiled."""
