"""Whether it is right: average precision, recall of phrases, agreement between subjects."""
