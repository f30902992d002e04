HIDDEN_COMMAND = "__complete"
