"""What a study says while it runs, and at its end. No rules here."""

import logging

from gdlib import watch

WATCHES = []  # one, while jobs run


def as_watched(job):
    """What a job is for whoever watches."""
    trains = job.rule.name in ("train_teacher", "train_student")
    recipe = PLAN.spec_of(run_of(job.wildcards)).recipe if trains else None
    return watch.Job(
        job.message or job.rule.name,
        job.rule.name,
        recipe.steps * recipe.batch_size * math.prod(recipe.patch) if trains else 0,
        min(job.threads, ALL_CORES),
    )


def start_watching():
    """Say how far the study is, from now on."""
    dag = workflow.dag
    jobs = {dag.jobid(job): job for job in dag.needrun_jobs()}
    quiet = any(
        str(part) in ("rules", "all") for part in workflow.output_settings.quiet or ()
    )
    cores = None if workflow.remote_exec else workflow.cores
    watched = {number: as_watched(job) for number, job in jobs.items()}
    done = lambda number: number in jobs and dag.finished(jobs[number])
    WATCHES.append(watch.Watch(watched, done, cores, quiet))
    logger = logging.getLogger("snakemake.logging")
    for handler in logger.handlers * quiet:
        handler.addFilter(watch.is_news)
    logger.addHandler(WATCHES[0])
    WATCHES[0].start(STUDY.title or CFG.study)


def stop_watching():
    """Say no more of it."""
    for one in WATCHES:
        one.stop()


def print_results():
    """Show the table of the study, and say where all that it made is."""
    path = f"{RESULTS}/table.md"
    if os.path.exists(path):
        print(f"\n{watch.aligned(open(path).read())}")
        print(f"This table is {path}; figures are in {RESULTS}/figures/.")
        print(
            f"All on one page: snakemake --report report.html --config study={CFG.study}"
        )
