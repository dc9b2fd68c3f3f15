// Package random has sagas that throw dice.
package random

import (
	crand "crypto/rand"
	"io"
	"math/rand"
	v2 "math/rand/v2"

	"github.com/deed-go/deed/saga"
	"github.com/google/uuid"
)

func run(s *saga.Run, _ int) (string, error) {
	_ = rand.Intn(6)                           // want `^rand.Intn in a saga: it is another value at every replay; record it as a step, with saga.Local$`
	_ = v2.IntN(6)                             // want `rand.IntN in a saga`
	_ = v2.N(6)                                // want `rand.N in a saga`
	_, _ = crand.Read(nil)                     // want `rand.Read in a saga`
	_, _ = io.ReadFull(crand.Reader, nil)      // want `rand.Reader in a saga`
	_ = rand.New(rand.NewSource(rand.Int63())) // want `rand.Int63 in a saga`
	_ = uuid.New()                             // want `uuid.New in a saga`
	_ = uuid.Must(uuid.NewV7())                // want `uuid.NewV7 in a saga`
	return uuid.NewString(), nil               // want `uuid.NewString in a saga`
}
