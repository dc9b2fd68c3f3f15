// Package vouched has sagas whose authors know better.
package vouched

import (
	"time"

	"github.com/deed-go/deed/saga"
)

func run(s *saga.Run, in map[string]int) (int, error) {
	_ = time.Now() //deed:deterministic only shown in the log
	//deed:deterministic only shown in the log
	_ = time.Now()
	// It is the same on every machine.
	//deed:deterministic there is one key,
	// always.
	for sku := range in {
		_ = s.Sleep(sku, time.Second)
	}
	_ = time.Now() // want `time.Now in a saga`
	_ = time.Now() //deed:deterministic // want `time.Now in a saga` `^a //deed:deterministic without a reason vouches for nothing; say why it is deterministic: //deed:deterministic REASON$`
	_ = time.Now() //deed:deterministically speaking // want `time.Now in a saga`
	_ = time.Now() // want `time.Now in a saga`
	_ = stamp()
	_ = dated()
	//deed:deterministic it shows what happens when it is not
	s.OnRollback("undo", func(s *saga.Run) error {
		return s.Until("x", time.Now())
	})
	s.OnRollback("undo", func(s *saga.Run) error { //deed:deterministic it shows what happens when it is not
		return s.Until("x", time.Now())
	})
	return 0, nil
}

// whole is for demonstrations.
//
//deed:deterministic it shows what happens when it is not
func whole(s *saga.Run, _ int) (int, error) {
	last = s
	return time.Now().Minute(), nil
}

//deed:deterministic it shows what happens when it is not
var last *saga.Run

// stamp looks at the clock once.
//
//deed:deterministic what it returns is compared with nothing
func stamp() time.Time { return time.Now() }

var dated = time.Now //deed:deterministic what it returns is compared with nothing
