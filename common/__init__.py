"""What nearly every script needs, and nothing that only one of them does.

`common` imports neither a script nor another room (teachers, published, evaluation, analysis). A
method that a reader wants to check against an equation stands in its script, not here. The one
exception is the attack, which training and evaluation must share.
"""


class UserError(Exception):
    """Something the user can mend: it ends a script with one line and exit status 2.

    The message names the flag or file, what was found, and what was expected.
    """
