// Deed is the operator's tool of the framework: it looks into stores, brings
// their schemas up to date, and measures what deed does on them.
//
//	go install github.com/deed-go/deed/cmd/deed@latest
//
// # Stores
//
// A store is named by a DSN, with --store or in the environment variable
// DEED_STORE:
//
//	sqlite:shop.db
//	postgres://ann:secret@db.example.org/shop
//	nats://nats.example.org:4222/?stream=shop
//	esdb://esdb.example.org:2113?tls=true
//	memory:
//
// Of several logs in a database of PostgreSQL, schema=NAME says which one; behind a
// pooler in transaction mode say pooled=true:
//
//	postgres://ann:secret@pooler.example.org:6432/shop?schema=orders&pooled=true
//
// A store in memory is empty and ends with the command: it is for measuring.
// Passwords are never printed. What only looks makes nothing: a file that does
// not exist is refused, and so is a server's database without the schema. An
// SQLite file's schema is brought up to date by whoever opens it, these commands
// included.
//
// An SQLite file belongs to one process at a time. While an application has it,
// every command fails with the number of that process; the file can be read
// meanwhile with SQLite's own shell, for which it has the view deed_history.
//
// # Looking
//
// Streams lists the streams that were written last, with their number of events:
//
//	deed streams --store sqlite:shop.db --category account
//
// Events reads the log, filtered by stream, category, type and tags, from either
// end, and can wait for more:
//
//	deed events --store sqlite:shop.db --stream account-ann
//	deed events --store sqlite:shop.db --type order.placed --tag customer:ann --backward --limit 10
//	deed events --store $DB --follow --after head --json | jq .data
//
// Projections shows how far each projection has come, who runs it, and how many
// events it has set aside; watching, also how fast it moves and how long it will
// take at that speed:
//
//	deed projections --store $DB
//	deed projections --watch --store $DB
//
// What has been set aside is listed and shown with its error; the process that
// runs the projection, which has its code, is asked to fold it again, or to give
// up an event, with the reason:
//
//	deed projections dead-letters balances --store $DB
//	deed projections dead-letter balances 4711 --store $DB
//	deed projections replay balances --store $DB
//	deed projections skip balances 4711 --note "the bank took it back" --store $DB
//	deed projections rebuild balances --store $DB
//
// Whether a projection is what the log makes of it today, it finds out on the
// side; the exit code is 1 when it is not:
//
//	deed projections verify balances --store $DB
//
// A new version of a projection is built beside the one that is read. They are
// compared, one is read from now on, or again, and the other is removed:
//
//	deed projections compare balances --from 1 --to 2 --store $DB
//	deed projections activate balances --version 1 --store $DB
//	deed projections drop balances --version 2 --store $DB
//
// # Sagas
//
// Sagas sums up the sagas of a store, lists the runs of one, and shows a run step
// by step:
//
//	deed sagas --store $DB
//	deed sagas list checkout --status blocked --store $DB
//	deed sagas show checkout o-17 --store $DB
//
// A run is told things by an event in its history, which whoever runs the saga
// sees: a signal, a request to cancel it, the result of a step that somebody has
// done by hand. Cancel, terminate, retry and resume are also for many runs:
//
//	deed sagas signal checkout o-17 approval --value '"ann"' --store $DB
//	deed sagas skip checkout o-17 do:charge --result '{"ID":"c-1"}' --note "paid in cash" --store $DB
//	deed sagas resume checkout --all --yes --store $DB
//
// # Schemas
//
// Migrate applies what is missing, or prints the statements for people who apply
// them with a tool of their own:
//
//	deed migrate --store $DB
//	deed migrate --store $DB --print > schema.sql
//
// # Measuring
//
// Bench measures one kind of work on your own database. What it writes stays
// there, in categories that begin with "bench_": use a database that can be
// thrown away.
//
//	deed bench append     --store $DB --writers 64 --duration 10s
//	deed bench append-dcb --store $DB --preload 1000000
//	deed bench execute    --store $DB --aggregates 1
//	deed bench project    --store $DB --kind sql --projections 10
//	deed bench live       --store $DB --other-process
//
// Append, append-dcb, execute and saga write; load, replay and project read;
// live is about the time in between. Each says with --help what an operation is
// and what can be set. A run warms up first, and looks afterwards whether what was
// acknowledged is really there. Package workload in cmd/deed/internal says how
// the time is taken.
//
// # For scripts
//
// With --json every command prints JSON: one document, or, for events, one object
// a line. The exit code is 0 when all went well, 1 when something failed, and 2
// when the command line is wrong. Interrupting events --follow and bench ends them
// in good order, with 0.
package main
