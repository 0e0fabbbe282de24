"""Claims about routers as data: what is trained for them, what is measured, and what the numbers say of them."""
