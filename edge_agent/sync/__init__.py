"""How models get onto this machine and stay whole: `store` keeps verified bytes, `fetch` brings them."""
