from clipseg_repro.cli import app

app(prog_name="clipseg-repro")
