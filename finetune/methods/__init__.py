"""What is trained and how: each method is one object for the whole life of a run. `registry` names them."""
