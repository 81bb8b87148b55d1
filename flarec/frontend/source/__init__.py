"""What a source's files hold, told from headers and sizes before anything is loaded; how unusual ones are opened."""
