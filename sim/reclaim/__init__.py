"""Ways for pages to leave under pressure: watermarks, the two LRU lists, swap and compression, and who is killed."""
