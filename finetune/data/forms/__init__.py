"""What a row of text may look like. A form is one file here, with all that is known of it, and one line of `FORMS`.

A form's file holds a `base.Form`: the columns by which a row is known to be of it, those that it reads, and how a row is
checked and brought to a `base.ParsedRow`. That class says how large it is and how it becomes tokens; forms may share one.
"""

from __future__ import annotations

# "module:name" of each form. A row that has the columns of several is of the first, but see `Form.leads`.
FORMS = {
    "messages": "finetune.data.forms.messages:FORM",
    "prompt_completion": "finetune.data.forms.prompt_completion:FORM",
    "alpaca": "finetune.data.forms.alpaca:FORM",
    "text": "finetune.data.forms.text:FORM",
    "preference": "finetune.data.forms.preference:FORM",
    "input_ids": "finetune.data.forms.input_ids:FORM",
}
