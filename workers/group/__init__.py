"""Groups: ranks on several machines that together are one worker."""
