package main

import (
	"time"

	"github.com/deed-go/deed/aggregate"
	"github.com/deed-go/deed/command"
)

// replayID is the one replay that a database holds.
const replayID = "log"

// The replay itself is an aggregate too: what it has finished is recorded like
// anything else.
type (
	Begun        struct{ Input string }
	DateFinished struct {
		Date time.Time
		Row  int // the date's last
	}
)

func (Begun) EventType() string        { return "replay.begun" }
func (DateFinished) EventType() string { return "replay.date_finished" }

// Replay says how far a replay has come.
type Replay struct {
	Input string
	Date  time.Time
	Row   int
}

var replays = aggregate.Define("replay",
	aggregate.On(func(r *Replay, e Begun) { r.Input = e.Input }),
	aggregate.On(func(r *Replay, e DateFinished) { r.Date, r.Row = e.Date, e.Row }),
)

// Begin starts a replay or takes it up again.
type Begin struct{ Input string }

// AggregateID returns the one replay.
func (Begin) AggregateID() string { return replayID }

// Decide refuses to mix two logs in one database.
func (c Begin) Decide(r Replay) ([]aggregate.Event, error) {
	switch r.Input {
	case "":
		return aggregate.Events(Begun(c)), nil
	case c.Input:
		return nil, nil
	}
	return nil, command.Rejectf("the database holds the replay of %q, not of %q: give another -db, or the same -input", r.Input, c.Input)
}

// FinishDate says that all rows of a date have been judged.
type FinishDate struct {
	Date time.Time
	Row  int
}

// AggregateID returns the one replay.
func (FinishDate) AggregateID() string { return replayID }

// Decide records a date once.
func (c FinishDate) Decide(r Replay) ([]aggregate.Event, error) {
	if !c.Date.After(r.Date) {
		return nil, nil
	}
	return aggregate.Events(DateFinished(c)), nil
}
