"""Several experts in one network: a backbone with a shared trunk and a branch per expert, and the losses RIDE, SADE, NCL, ResLT."""
