/* What the classes of posix_ipc.mp_integration stand on: the private methods that all three types have. */
#include "ext.h"

#if HAVE_TRACKING

#include <errno.h>

/* Borrowed; NULL with an exception set. The interpreter may have taken the module apart, and with it the type. */
static JournalObject *
as_journal(State *state, PyObject *arg)
{
    if (!Py_IS_TYPE(arg, state->Journal)) {
        PyErr_Format(PyExc_TypeError, "not a Journal: %R", arg);
        return NULL;
    }
    return (JournalObject *)arg;
}

int
tracked_create_arguments(State *state, PyObject *args, int extra, JournalObject **journal, PyObject **name,
                         PyObject **encoded, mode_t *mode)
{
    if (PyTuple_GET_SIZE(args) != 3 + extra) {
        PyErr_Format(PyExc_TypeError, "_create() takes %d arguments", 3 + extra);
        return -1;
    }
    PyObject *first = PyTuple_GET_ITEM(args, 0);
    *journal = NULL;
    if (first != Py_None && (*journal = as_journal(state, first)) == NULL) {
        return -1;
    }
    return args_mode(PyTuple_GET_ITEM(args, 2), mode) < 0 ? -1
           : args_name_for(PyTuple_GET_ITEM(args, 1), O_CREAT | O_EXCL, name, encoded);
}

const char tracked_share_doc[] =
"_share($self, tree, /)\n--\n\n"
"Before this handle is pickled: is it written down that somebody else may be about to open the object?\n\n"
"False: it cannot be, because this process has no record of it; make a claim. A handle that came from a pickle of this\n"
"very tree, a number, needs none: as long as the root lives, what it came from is kept.";

PyObject *
tracked_share(PyObject *op, PyObject *arg)
{
    NamedObject *self = (NamedObject *)op;
    unsigned long long tree = PyLong_AsUnsignedLongLong(arg);
    bool done;
    if (tree == (unsigned long long)-1 && PyErr_Occurred()) {
        return NULL;
    }
    Py_BEGIN_CRITICAL_SECTION(self);
    Tracking *tracking = &self->tracking;
    done = tree != 0 && tracking->tree == tree;
    const Record *record = &tracking->record;
    if (record_state(record) != SLOT_FREE) {
        journal_share(record->journal, record->index, &record->identity);
        done = true;
    }
    Py_END_CRITICAL_SECTION();
    return PyBool_FromLong(done);
}

const char tracked_record_doc[] =
"_record($self, journal, kind, own, shared, /)\n--\n\n"
"Write down in this process's journal that it owns the object, or else only that it must stay; and whether others may be\n"
"about to open it. False: no slot is free.";

PyObject *
tracked_record(PyObject *op, PyObject *args)
{
    NamedObject *self = (NamedObject *)op;
    State *state = state_of(op);
    PyObject *arg;
    int kind, own, shared;
    Record record = {.index = -1};
    if (state == NULL || !PyArg_ParseTuple(args, "Oipp:_record", &arg, &kind, &own, &shared) ||
        (record.journal = as_journal(state, arg)) == NULL) {
        return NULL;
    }
    JournalObject *dropped = NULL;
    int error = 0;
    Py_BEGIN_CRITICAL_SECTION(self);
    Record *old = &self->tracking.record;
    SlotState said = record_state(old);
    if (self->encoded == NULL) {
        error = EBADF;
    }
    else if (said == SLOT_OWNED || (said == SLOT_CLAIM && !own)) { /* another thread was quicker */
        if (!own) {
            journal_share(old->journal, old->index, &old->identity);
        }
    }
    else {
        record.identity = self->identity;
        record.index = journal_add(record.journal, own ? SLOT_OWNED : SLOT_CLAIM, (Kind)kind,
                                   record_name(PyBytes_AS_STRING(self->encoded)), &self->identity, shared);
        error = record.index < 0 ? NO_SLOT : 0;
        if (error == 0) { /* a claim of before stays: for pickles in flight, which may be those of another handle */
            Py_INCREF(record.journal);
            dropped = old->journal;
            *old = record;
        }
    }
    Py_END_CRITICAL_SECTION();
    Py_XDECREF(dropped);
    return error == EBADF ? named_raise(self, EBADF, "_record", NULL) : PyBool_FromLong(error == 0);
}

const char tracked_forget_doc[] =
"_forget($self, /)\n--\n\n"
"Take back what this process's journal says of the object.";

PyObject *
tracked_forget(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    NamedObject *self = (NamedObject *)op;
    Py_BEGIN_CRITICAL_SECTION(self);
    record_remove(&self->tracking.record);
    Py_END_CRITICAL_SECTION();
    Py_RETURN_NONE;
}

void
tracked_forget_if_gone(NamedObject *self, int descriptor)
{
    FileFacts facts;
    Record *record = &self->tracking.record;
    if (record_state(record) != SLOT_FREE && identity_facts(descriptor, &facts) == 0 && facts.links == 0 &&
        identity_same_object(&facts.identity, &record->identity)) {
        record_remove(record);
    }
}

PyObject *
tracked_get_owned(PyObject *op, void *Py_UNUSED(closure))
{
    NamedObject *self = (NamedObject *)op;
    bool owned;
    Py_BEGIN_CRITICAL_SECTION(self);
    owned = record_state(&self->tracking.record) == SLOT_OWNED;
    Py_END_CRITICAL_SECTION();
    return PyBool_FromLong(owned);
}

PyObject *
tracked_get_identity(PyObject *op, void *Py_UNUSED(closure))
{
    NamedObject *self = (NamedObject *)op;
    Identity identity;
    Py_BEGIN_CRITICAL_SECTION(self);
    identity = self->identity;
    Py_END_CRITICAL_SECTION();
    return Py_BuildValue("(KKK)", (unsigned long long)identity.device, (unsigned long long)identity.inode,
                         (unsigned long long)identity.born);
}

PyObject *
tracked_get_created_here(PyObject *op, void *Py_UNUSED(closure))
{
    NamedObject *self = (NamedObject *)op;
    pid_t creator;
    Py_BEGIN_CRITICAL_SECTION(self);
    creator = self->tracking.creator;
    Py_END_CRITICAL_SECTION();
    return PyBool_FromLong(creator == getpid());
}

const char tracked_unlink_doc[] =
"_unlink($self, /)\n--\n\n"
"Unlink the object if its name still leads to it, silently if not, and forget the record.";

static void
drop_unlinking(Unlinking *unlinking)
{
    Py_DECREF(unlinking->name);
    Py_DECREF(unlinking->encoded);
    Py_XDECREF(unlinking->record.journal);
}

int
tracked_begin_unlink(NamedObject *self, Kind kind, Unlinking *unlinking)
{
    Py_BEGIN_CRITICAL_SECTION(self);
    unlinking->name = self->name;
    unlinking->encoded = self->encoded;
    unlinking->identity = self->identity;
    unlinking->record = self->tracking.record;
    Py_XINCREF(unlinking->name);
    Py_XINCREF(unlinking->encoded);
    Py_XINCREF(unlinking->record.journal);
    Py_END_CRITICAL_SECTION();
    if (unlinking->name == NULL) {
        named_raise(self, EBADF, "_unlink", NULL);
        return -1;
    }
    if (audit_unlink(kind, unlinking->name) < 0) {
        drop_unlinking(unlinking);
        return -1;
    }
    return 0;
}

PyObject *
tracked_end_unlink(NamedObject *self, Unlinking *unlinking, const char *call, int error)
{
    PyObject *result;
    if (error == 0 || error == ENOENT) { /* somebody else did it, which is as well */
        record_remove(&unlinking->record);
        result = Py_NewRef(Py_None);
    }
    else {
        result = named_raise(self, error, call, NULL);
    }
    drop_unlinking(unlinking);
    return result;
}

PyObject *
tracked_unlink_file(NamedObject *self, Kind kind)
{
    char path[SHM_PATH_SIZE];
    FileFacts facts;
    Unlinking unlinking;
    int error;
    if (tracked_begin_unlink(self, kind, &unlinking) < 0) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    error = object_path(kind, PyBytes_AS_STRING(unlinking.encoded), path);
    if (error == 0 && identity_facts_at(path, &facts) < 0) {
        error = errno;
    }
    if (error == 0 && identity_same_object(&facts.identity, &unlinking.identity) && unlink(path) < 0) {
        error = errno;
    }
    Py_END_ALLOW_THREADS
    return tracked_end_unlink(self, &unlinking, "unlink", error);
}

#endif
