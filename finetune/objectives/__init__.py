"""What a step makes small: the loss of trained tokens, or, without gradients, anything that can be computed of a model.

| objective      | of a step's rows                                                                    | passes  |
|----------------|-------------------------------------------------------------------------------------|---------|
| loss           | mean cross entropy of the trained tokens                                            | 1       |
| classification | mean cross entropy of the right one among the data's few completions                | 1       |
| accuracy       | share of rows whose likeliest completion is another than theirs                     | 1       |
| exact_match    | share of rows whose completion is not what greedy decoding gives                    | 1       |
| f1, functions  | 1 - mean F1, - mean reward, of what greedy decoding gives                           | 1 a token |

Of methods with gradients, beside loss (`training.objective`), for rows of a chosen and a rejected answer:

| objective      | of a step's pairs                                                                   | passes  |
|----------------|-------------------------------------------------------------------------------------|---------|
| dpo            | mean loss of the difference of log(p / reference) between the answers               | 1       |
| cpo, simpo     | mean loss of the difference of log p between the answers                            | 1       |
| kto            | of single rows with a label: mean loss of log(p / reference), against the step's    | 1       |
| orpo           | mean cross entropy of the chosen texts, and mean loss of the odds ratio             | 1       |

classification is MeZO's train_as_classification, the last three its "non-differentiable objectives" (Malladi et al. 2023,
section 3.3). An objective is one file here and one line in `registry`.
"""
