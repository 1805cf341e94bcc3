"""What a model consists of and how it behaves, as numbers, pictures and one page (`stellarbyte analyse`)."""
