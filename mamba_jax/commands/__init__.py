"""Programs of the command line: each reads its words and calls what does the job."""
