"""Weight files that learner and serving both read: their format is a contract between the two, who never import each other."""
