package sqlite

import (
	"strings"
	"sync"
	"sync/atomic"

	"modernc.org/libc"
	sqlite3 "modernc.org/sqlite/lib"
)

// guard refuses, while it is on, what SQL of the user must not do: end the
// transaction it runs in, reach for other files, or change deed's own tables.
// It also learns how long the write-ahead log is.
type guard struct {
	id    uintptr
	on    atomic.Bool
	pages atomic.Int64 // in the write-ahead log after the last commit

	altered atomic.Bool // a statement that changes a table was prepared
}

// guards finds the guard for the id that SQLite hands back: it cannot keep a
// Go pointer.
var guards struct {
	sync.Mutex
	last uintptr
	byID map[uintptr]*guard
}

// install makes the connection ask the guard about every statement it
// prepares.
func (c *conn) install() *guard {
	guards.Lock()
	defer guards.Unlock()
	if guards.byID == nil {
		guards.byID = map[uintptr]*guard{}
	}
	guards.last++
	c.guard = &guard{id: guards.last}
	guards.byID[c.guard.id] = c.guard
	sqlite3.Xsqlite3_set_authorizer(c.tls, c.db, function(authorize), c.guard.id)
	sqlite3.Xsqlite3_wal_hook(c.tls, c.db, function(committed), c.guard.id)
	return c.guard
}

func guardOf(id uintptr) *guard {
	guards.Lock()
	defer guards.Unlock()
	return guards.byID[id]
}

// committed replaces SQLite's own checkpoints, whose errors it ignores.
func committed(_ *libc.TLS, id, _, _ uintptr, pages int32) int32 {
	if g := guardOf(id); g != nil {
		g.pages.Store(int64(pages))
	}
	return sqlite3.SQLITE_OK
}

func (g *guard) forget() {
	guards.Lock()
	defer guards.Unlock()
	delete(guards.byID, g.id)
}

// ownPrefix begins the names of deed's own tables.
const ownPrefix = "deed_"

// own reports whether a name is one of deed's, or of the table that gives the
// pages of the file.
func own(name uintptr) bool {
	text := strings.ToLower(libc.GoString(name))
	return strings.HasPrefix(text, ownPrefix) || text == "sqlite_dbpage"
}

func authorize(_ *libc.TLS, id uintptr, action int32, first, second, database, _ uintptr) int32 {
	g := guardOf(id)
	if g == nil || !g.on.Load() {
		return sqlite3.SQLITE_OK
	}
	denied := false
	switch action {
	case sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_SAVEPOINT, sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA:
		denied = true
	// What is temporary belongs to the connection, outlives the transaction and
	// goes before deed's tables: it would change what deed's own statements do.
	case sqlite3.SQLITE_CREATE_TEMP_TABLE, sqlite3.SQLITE_CREATE_TEMP_VIEW, sqlite3.SQLITE_CREATE_TEMP_INDEX, sqlite3.SQLITE_CREATE_TEMP_TRIGGER,
		sqlite3.SQLITE_DROP_TEMP_TABLE, sqlite3.SQLITE_DROP_TEMP_VIEW, sqlite3.SQLITE_DROP_TEMP_INDEX, sqlite3.SQLITE_DROP_TEMP_TRIGGER:
		denied = true
	case sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_CREATE_VIEW, sqlite3.SQLITE_CREATE_VTABLE,
		sqlite3.SQLITE_DROP_TABLE, sqlite3.SQLITE_DROP_VIEW, sqlite3.SQLITE_DROP_VTABLE, sqlite3.SQLITE_INSERT, sqlite3.SQLITE_DELETE:
		denied = own(first) || libc.GoString(database) == "temp"
	case sqlite3.SQLITE_UPDATE:
		denied = own(first)
	case sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_DROP_INDEX, sqlite3.SQLITE_CREATE_TRIGGER, sqlite3.SQLITE_DROP_TRIGGER:
		denied = own(first) || own(second) // its own name, and its table's
	case sqlite3.SQLITE_ALTER_TABLE:
		g.altered.Store(true) // the new name of a table is not told
		denied = own(second)
	}
	if denied {
		return sqlite3.SQLITE_DENY
	}
	return sqlite3.SQLITE_OK
}

// ownObjects counts what bears a name of deed's.
func ownObjects(c *conn) (int64, error) {
	return c.number(`SELECT count(*) FROM sqlite_schema WHERE name LIKE 'deed\_%' ESCAPE '\'`)
}
