"""One run or many as a page that people can look at, offline."""
