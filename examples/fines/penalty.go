package main

import (
	"time"

	"github.com/deed-go/deed/eventstore"
	"github.com/deed-go/deed/saga"
)

// GraceDays is how long an offender has, from the notification on, until a
// penalty may be added.
const GraceDays = 60

// Notification starts the saga of a fine.
type Notification struct {
	Fine string
	Due  time.Time
}

// penalties runs once for each notified fine, sixty days long: it waits in the
// store, not in memory, and survives the process.
var penalties = saga.Define("penalty", func(s *saga.Run, n Notification) (struct{}, error) {
	if err := s.Until("grace", n.Due); err != nil {
		return struct{}{}, err
	}
	return struct{}{}, saga.Execute(s, "mark", fines, MarkPenaltyDue{n.Fine})
}, saga.On(func(_ Notified, r eventstore.Recorded) (string, Notification) {
	return r.Stream.ID, Notification{Fine: r.Stream.ID, Due: r.Time.AddDate(0, 0, GraceDays)}
}))
