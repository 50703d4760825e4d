"""Contrast losses and their feature memory: GML, class-wise queues, fused CUDA kernels; SupCon, BCL, PaCo, KCL, ProCo, CRD.

All terms except GML have one call protocol, `ContrastTerm` in terms.py:

    term.begin_epoch(epoch, epochs)                                   # before the first step of an epoch
    loss = term(ContrastInputs(queries, target, sample_ids, ...))["loss"]
    loss.backward()
    optimiser.step()
    term.after_step()                                                 # stores the features of the step

The objective runs the networks and passes features; heads and memory belong to the term. `term.views` is the number of
query views, `term.uses` names the optional inputs (key, logits, class_weight). GML fits the protocol: queries [1,B,D],
the raw key features [B,E], which it stores before the loss, its two heads, the queues and log tau_g as state, L_tau as
part of the loss and of the observations.
"""
