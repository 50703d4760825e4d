"""Several experts in one network: a backbone with a trunk and a branch for each expert; losses of RIDE, SADE, NCL and ResLT."""
