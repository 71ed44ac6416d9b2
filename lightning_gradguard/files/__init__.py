"""Files that may be half written, damaged, or a stranger's: lines of JSON, and what torch has saved."""
