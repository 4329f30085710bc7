"""The checks of ``textrlhf doctor``, each a function from a patient to a finding."""
